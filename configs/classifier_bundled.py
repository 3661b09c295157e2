"""The classifier that comes with SafeLM: logistic regression on words and the character n-grams inside them.

    pip install --no-deps pyrit==1.1.0
    python -m safelm.train_classifier --config=configs/classifier_bundled.py --output=W --data=pyrit \
        --data=openai_moderation:D/openai_moderation_train_840.jsonl.gz --data=toxigen:D/toxigen_human_train.json.gz \
        --data=davidson:D/davidson_labeled_data.csv.gz --data=implicit_hate:D/implicitHate.json.gz \
        --data=edos:D/edos_labelled_aggregated.csv.gz --data=dynahate:D/ken20_train_20692.csv.gz \
        --data=dynahate:D/dyn21_train_union.jsonl.gz --data=conv_abuse:D/ConvAbuseEMNLPtrain.csv.gz \
        --data=safe:T/c4_train.jsonl.gz --data=safe:T/c4_validation.jsonl.gz

`W/ngrams.safetensors` is what lies in `safelm/safety/ngrams/weights`, where the data sheet names sets and licences. For
a classifier of your own give your labels and some hundred safe pages. 126,138 texts, of which 61,000 are trained on:
61 s of one core (14 fits: the model, 4 for the pages' scores, 9 with a set left out), 257 s on two cores with a load
of 12.

Sets left out as a whole: mean AUROC .712, from .580 (DynaHate) to .900 (Davidson); of 300 C4 pages .063 [.041, .097]
get 1 or more, .010 [.003, .029] 3 or more. Tables, and 7,826 C4 pages a second on a core: `docs/results/classifier.md`.

Candidates, mean AUROC on the same nine sets, each left out in turn: smaller samples of them (2,500 texts of a side)
with l2 of 1e-4 .697, 3e-5 .693, 3e-4 .695. Before that, on up to 6,000 texts a set, other weights and scikit-learn:
words .696, n-grams alone .693, words and pairs .695, words, n-grams and pairs .696; means of MiniLM's vectors of the
words .644; and on up to 5,000 a small network (vectors of 32 for words and n-grams begun with MiniLM's, a convolution
over three words, attention: `scripts/studies/bundled_candidates.py`) .709, or .728 without PyRIT's answers where the
n-grams had .722. Single runs. The network's .006 to .013 did not pay for a second file of vectors, a convolution and
several times the time; n-grams cost nothing and read misspelled words. Not tried: a distilled encoder.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": (),
            "ngrams": {  # see `safelm.safety.ngrams.training.NgramRecipe`
                "bits": 18,
                "l2": 1e-4,
                "steps": 60,
                "balance": {"cap": 6000, "caps": (), "power": 0.5},  # see `safelm.safety.classifier.balance`
                "web_share": 0.5,
                "page_folds": 4,
                "leave_one_out": True,
            },
        }
    ).lock()
