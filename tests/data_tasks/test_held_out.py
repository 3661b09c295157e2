"""What is held out of a corpus without validation files: by the page that a text was made from, in every task."""

import seqio
from document_files import write_rows

from data_tasks import tasks
from safelm.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat. A bad thing happened here."] * 9, 300)


def ids(name, split="train"):
    found = seqio.get_mixture_or_task(name).get_dataset(split=split, shuffle=False).as_numpy_iterator()
    return [example["id"].decode() for example in found]


def test_nothing_is_held_out_of_texts_that_are_there_to_be_learned(tmp_path):
    rows = [{"id": f"d{i}", "text": f"the cat {i}", "harm_score": 0} for i in range(2)]
    for folder in ("alignment_text", "canaries", "raw_web"):
        write_rows(tmp_path / folder / "train-0.jsonl", rows)
    tasks.register(str(tmp_path), TOKENIZER, prefix="few")
    for name in ("alignment_text", "canaries"):
        assert ids(f"few_{name}") == ["d0", "d1"]
        assert seqio.get_mixture_or_task(f"few_{name}").splits == ("train",)
    assert len(ids("few_raw_web")) == 1
    write_rows(tmp_path / "alignment_text/validation-0.jsonl", rows[:1])
    tasks.register(str(tmp_path), TOKENIZER, prefix="own")
    assert (ids("own_alignment_text"), ids("own_alignment_text", "validation")) == (["d0", "d1"], ["d0"])
