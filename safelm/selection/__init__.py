"""Selects a corpus for a budget of tokens: filtered, without copies and evaluation prompts, sampled by strata.

Two passes over the input, in memory that does not grow with its text:

settings       what decides a selection, and the forms of its flags
reading        rows of a shard, as values and as they stand in the file
contamination  runs of 13 words that a document shares with prompts of evaluation sets
measuring      the first pass: tokens, strata, hashes of every row, in a file per shard
keys           the pseudo-random order of rows, by seed, file and row
copies         exact and near-duplicates, found by sorting hashes on disk
sampling       the cutoff in the order of rows that meets a budget in every stratum
choosing       which rows stay, from what the first pass measured
writing        the second pass: copies the chosen rows
plan           settings of the output folder, shards, what is done
data_card      counts, funnel, licences, contamination, as JSON and Markdown
"""
