"""What the task files name as their data: documents of a benchmark as the harness's splits.

Importing it registers the model `safelm`: so the harness's own command knows it once a task file given by path is read.
"""

from typing import Any

import datasets

from safelm.evaluate.capability import documents as documents_lib
from safelm.evaluate.capability import lm_eval_model  # noqa: F401  registers


def load(documents: str, data: str = "", max_items: int = 0, fewshot: str = "", **_: Any) -> dict[str, Any]:
    """What the task files name as `custom_dataset`: splits `test` and, where there is one, `train`.

    Args:
      documents, fewshot: names in `documents.FILES` (from the task file).
      data: folders, with commas between them; max_items: of the test split, 0 for all (from `--metadata`).
    """
    folders = [folder for folder in data.split(",") if folder]
    if not folders:
        raise ValueError('no data folder: give --metadata \'{"data": "DIR"}\' to lm_eval')
    splits = {
        "test": datasets.Dataset.from_list(documents_lib.sample(documents_lib.read(documents, folders), max_items))
    }
    if fewshot and documents_lib.candidates(fewshot, folders):
        splits["train"] = datasets.Dataset.from_list(documents_lib.read(fewshot, folders))
    return splits
