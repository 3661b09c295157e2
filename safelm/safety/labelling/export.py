"""The labels as a training file: `safelm.train_classifier --data=harm_score:OUTPUT/labels.jsonl`.

A document is one row, however many annotators labelled it: `harm_score` is their mean, a half rounded up,
`harm_votes` how many gave each of the six scores, a soft label where they disagree, and `harm_kinds` the share of them
that named each kind. Notes stay in the journals.
"""

import json
from typing import Any

from safelm.io import files
from safelm.safety.labelling import measures
from safelm.safety.labelling.folder import LabelFolder
from safelm.safety.labelling.journal import Journal

NAME = "labels.jsonl"


def export(folder: LabelFolder, own: Journal | None = None) -> dict[str, Any]:
    """Writes the training file and what was measured to the manifest; the measures.

    Raises ValueError as `LabelFolder.labels`, or where there is no label yet.
    """
    labels = folder.labels(own)
    measured = measures.measure(folder.documents, labels)
    if not labels:
        raise ValueError(f"{folder.root}: no document has a label yet")
    lines = []
    for number, given in labels.items():
        document = folder.documents[number]
        row = {
            "id": document.id,
            "text": document.text,
            "harm_score": measures.consensus(given),
            "harm_votes": measures.votes(given),
            "harm_kinds": measures.kinds(given),
            "annotators": sorted(given),
        }
        lines.append(json.dumps(row) + "\n")
    path = files.write_whole(folder.root / NAME, "".join(lines))
    folder.publish({NAME: {"bytes": path.stat().st_size, "rows": len(lines)}}, measured)
    return measured
