"""Conversations in all supported storage formats."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet

ROWS = [
    [
        {"role": "user", "content": f"Question {n}"},
        {"role": "assistant", "content": f"Answer {n} " + "and so on 🙂 " * (n % 5)},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": f"Then {n}."},
    ][: 4 - 2 * (n % 2)]
    for n in range(40)
]


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def messages(rows):
    return [{"messages": row} for row in rows]


def sharegpt(rows):
    names = {"user": "human", "assistant": "gpt"}
    return [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row]} for row in rows]


STORES = {
    "messages": ("rows.jsonl", messages(ROWS), {}),
    "from and value": ("rows.jsonl", sharegpt(ROWS), {}),
    "prompt and completion": (
        "rows.jsonl",
        [{"prompt": row[:-1], "completion": row[-1:]} for row in ROWS],
        {"train_on": "last"},
    ),
    "another key": ("rows.jsonl", [{"dialog": row, "messages": None} for row in ROWS], {"text_key": "dialog"}),
    "text of JSON": ("rows.parquet", [{"messages": json.dumps(row)} for row in ROWS], {}),
    "parquet": ("rows.parquet", messages(ROWS), {}),
    "arrow": ("rows.arrow", messages(ROWS), {}),
    "csv": ("rows.csv", messages(ROWS), {}),
    "an array": ("rows.json", messages(ROWS), {}),
    "saved by datasets": ("saved", messages(ROWS), {}),
    "a dataset": ("hf", messages(ROWS), {}),
}


def store(folder, name, rows):
    """Write rows in one of the storage formats; returns the name of the source."""
    path = folder / name
    if name in ("saved", "hf"):
        if name == "saved":
            datasets.Dataset.from_list(rows).save_to_disk(path)
            return str(path)
        path.mkdir()
        write(path, rows)
        return f"hf:{path}"
    if name == "rows.json":
        path.write_text(json.dumps(rows, indent=1))
    elif name == "rows.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["messages"], *([json.dumps(row["messages"])] for row in rows)])
    elif name == "rows.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif name == "rows.arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        write(folder, rows, name)
    return str(path)
