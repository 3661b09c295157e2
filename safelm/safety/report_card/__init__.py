"""The data safety report card of a corpus: scores, and frequencies of harmful n-grams (Maini et al. 2025, 3.5, D).

normal_form   which texts count as equal: words, case, Unicode, separators
queries       the n-grams, by category
matching      finds all queries in a batch of documents in one pass
tally         counts that merge
corpus        counts files, on all cores
card          computes the card's figures with intervals
charts, page  present a card
difference    compares two cards, before and after
"""
