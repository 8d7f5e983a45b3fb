"""Sample documents, and functions that read sources."""

import json

from ropepp_lit.text.sources import START, Reader, find_files

DOCUMENTS = [f'Document {n}, "äöü 漢字 🙂"\r\n\tfox' * (1 + n % 5) for n in range(600)]


def json_lines(documents):
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)).encode()


def read(*sources, start=START, **options):
    return [record for _, record in Reader(find_files([str(s) for s in sources], key="text"), start=start, **options)]


def texts(*sources, **options):
    records = read(*sources, **options)
    assert [record.problem for record in records if record.text is None] == []
    return [record.text for record in records]
