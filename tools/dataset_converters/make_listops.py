"""Write the ListOps data of the Long Range Arena, which are made by a program.

    python tools/dataset_converters/make_listops.py data/listops
    python tools/dataset_converters/make_listops.py data/listops-1000 --max-length 1000

An expression is a digit with a probability of 0.75, always in depth 10, else an operator (MIN, MAX,
MED, the median without its fraction, or SM, the sum modulo 10) of 2 to 10 expressions. It has 2
tokens more than its arguments together, and is kept if it has more than 500 and fewer than
2000 and did not occur before: 96000 for training, 2000 for validation, 2000 for the test.

    OUT/basic_{train,val,test}.tsv       columns Source, Target; binary trees in parentheses

The folder gets its name when it is complete; a complete one with the same parameters is kept.
"""

import random
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from mmsoft.conversion import at_least, generate, generator_parser, track, write_once

VERSION = 1  # raise it when the same parameters no longer give the same expressions
OPERATOR_PROBABILITY, MAX_DEPTH, MAX_ARGUMENTS = 0.25, 10, 10


def median(values: list[int]) -> int:
    """The integer part of the median."""
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2


OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": median,
    "[SM": lambda values: sum(values) % 10,
}
NAMES = list(OPERATORS)


class TooLongError(Exception):
    """The expression has reached the largest length."""


def expression(rng: random.Random, room: int, depth: int = 1) -> tuple[str, int, int]:
    """Draw one: its text, its value, and its length in tokens.

    Raises:
        TooLongError: it has more than ``room`` tokens.
    """
    if depth == MAX_DEPTH or rng.random() > OPERATOR_PROBABILITY:
        digit = rng.randrange(10)
        return str(digit), digit, 1
    length, texts, values = 2, [], []
    for _ in range(rng.randint(2, MAX_ARGUMENTS)):
        text, value, size = expression(rng, room - length, depth + 1)
        texts.append(text)
        values.append(value)
        length += size
        if length > room:
            raise TooLongError
    name = rng.choice(NAMES)
    # A tree of pairs: the operator with its first argument, that with the second, and so on.
    text = "( " * (len(texts) + 1) + name + " " + " ) ".join(texts) + " ) ] )"
    return text, OPERATORS[name](values), length


def expressions(seed: int, low: int, high: int) -> Iterator[tuple[str, int]]:
    """Without end, those with more than ``low`` and fewer than ``high`` tokens, none twice."""
    rng, seen = random.Random(f"listops {VERSION} {seed}"), set()
    while True:
        try:
            text, value, length = expression(rng, high - 1)
        except TooLongError:
            continue
        if length > low and (mark := blake2b(text.encode(), digest_size=8).digest()) not in seen:
            seen.add(mark)
            yield text, value


def write(out: Path, sizes: dict[str, int], seed: int, low: int, high: int) -> None:
    """Write the files of all splits."""
    found = expressions(seed, low, high)
    for split, size in sizes.items():
        print(f"{split}: {size}")
        with (out / f"basic_{split}.tsv").open("w") as file:
            file.write("Source\tTarget\n")
            for text, value in track(islice(found, size), size):
                file.write(f"{text}\t{value}\n")


def main() -> None:
    """Read the command line and write the data set."""
    sizes = dict(train=96000, val=2000, test=2000)
    parser = generator_parser(__doc__, sizes, "expressions")
    parser.add_argument("--min-length", type=at_least(2), default=500, help="all are longer (500)")
    parser.add_argument("--max-length", type=int, default=2000, help="all are shorter (2000)")
    args = parser.parse_args()
    low, high = args.min_length, args.max_length
    if high - low < 10:
        parser.error(f"--max-length must be at least {low + 10}, got {high}")
    sizes = {split: getattr(args, split) for split in sizes}
    parameters = dict(sizes, version=VERSION, seed=args.seed, min_length=low, max_length=high)

    def fill(folder: Path) -> None:
        write(folder, sizes, args.seed, low, high)

    generate(args.out, lambda: write_once(args.out, parameters, fill))


if __name__ == "__main__":
    main()
