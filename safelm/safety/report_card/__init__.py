"""The data safety report card of a corpus: scores, and how often harmful n-grams occur (Maini et al. 2025, 3.5, D).

normal_form   what counts as the same text: words, case, Unicode, what may stand between words
queries       which n-grams are looked for, by category
matching      one pass over a batch of documents with all queries at once
tally         what was counted, mergeable
corpus        files to tallies, over all cores
card          tallies to the card's numbers, with intervals
charts, page  how a card is shown
difference    two cards, before and after
"""
