"""The data of the task files: documents of a benchmark as splits for the harness.

Importing it registers the model `safelm`, so the harness's own command knows the model once it reads a task file.
"""

from typing import Any

import datasets

from safelm.evaluate.capability import documents as documents_lib
from safelm.evaluate.capability import lm_eval_model  # noqa: F401  registers


def load_dataset(documents: str, data: str = "", max_items: int = 0, fewshot: str = "", **_: Any) -> dict[str, Any]:
    """The function `custom_dataset` of the task files: splits `test` and, if there is one, `train`.

    Args:
      documents, fewshot: names in `documents.FILES`, from the task file.
      data: comma-separated folders, from `--metadata`.
      max_items: size of the test split, 0 for all, from `--metadata`.
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
