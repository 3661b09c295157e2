"""People's harm scores for the documents that teach a classifier most: which ones, kept how, worth what.

`pool` reads scored documents or scores a sample, `choice` picks, `folder` keeps what was picked, `journal` keeps every
label as soon as it is given, `measures` says what the labels tell of the scorers, `export` makes a training file.
The page that shows them is `safelm.serving.labelling`.
"""
