"""Trainings in turns that take no time: their logs alone."""

import json

from mmsoft.commands import Usage


def pretend_mim(monkeypatch):
    """Gives the arguments of the commands, which is filled as they are asked for.

    Each logs four iterations: 9, 9, 1 + the number of commands before it, and 2 seconds.
    """
    runs = []

    def mim(title, arguments, log, folder):
        run = log.parent / "now" / "vis_data"
        run.mkdir(parents=True)
        seconds = enumerate((9, 9, 1 + len(runs), 2), 1)
        entries = [dict(step=step, time=time, loss=1) for step, time in seconds]
        (run / "scalars.json").write_text("\n".join(map(json.dumps, entries)))
        runs.append(arguments)
        return Usage(22.0, 100 * len(runs))

    monkeypatch.setattr("mmsoft.rows.mim", mim)
    return runs
