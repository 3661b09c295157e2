"""The kinds of tokens that a run counts apart: in its plan (`--dry_run`) and, with their loss, in its metrics.

A task that knows says of every token what it is, in the channel `kind`. Elsewhere `TEXT` stands there, and the rest is
told by the target and its weight: the harm tag is a tag, a token of loss weight 0 is masked.
"""

KINDS = ("text", "tag", "prefix", "masked", "unlikelihood", "note", "control")
TEXT, TAG, PREFIX, MASKED, UNLIKELY, NOTE, CONTROL = range(len(KINDS))
