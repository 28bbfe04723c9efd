"""Small data of the Long Range Arena's tasks, in the formats in which they are distributed."""

import numpy as np


def write_listops(root):
    root.mkdir(parents=True)
    for split in ("train", "val", "test"):
        lines = ["Source\tTarget"]
        for value in range(8):
            lines.append(f"( ( ( [MAX {value} ) ( ( ( [SM 1 ) 9 ) ] ) ) ] )\t{value}")
        lines.append("( ( ( ( [MED 3 ) 4 ) ( ( [MIN 7 ) ] ) ) ] )\t4")
        (root / f"basic_{split}.tsv").write_text("\n".join(lines) + "\n")
    return root


def write_imdb(root):
    for split in ("train", "test"):
        for name, text in (("neg", "dull"), ("pos", "fine")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                review = f"So {text}, {'and on ' * i}<br />\u00e9"
                (folder / f"{i}_7.txt").write_bytes(review.encode())
    return root


def write_aan(root):
    root.mkdir(parents=True)
    for split in ("train", "eval", "test"):
        lines = [f"{i % 2}\t{i}\t{i + 9}\tshort {i}\tmuch longer {'text ' * i}" for i in range(8)]
        (root / f"new_aan_pairs.{split}.tsv").write_text("\n".join(lines) + "\n")
    return root


def write_cifar(root, records=6):
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        data = rng.integers(0, 256, (records, 3073), np.uint8)
        data[:, 0] %= 10
        (root / name).write_bytes(data.tobytes())
    return root


def write_pathfinder(root, pictures=6):
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        images = rng.integers(0, 256, (pictures, 32, 32), np.uint8)
        labels = np.arange(pictures, dtype=np.uint8) % 2
        np.savez_compressed(root / f"pathfinder32_{split}.npz", images=images, labels=labels)
    return root


WRITERS = dict(
    listops=write_listops,
    text=write_imdb,
    retrieval=write_aan,
    image=write_cifar,
    pathfinder32=write_pathfinder,
)
