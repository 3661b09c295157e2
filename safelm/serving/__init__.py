"""An OpenAI-compatible server over the decoding engine, and the playground page; `safelm.serve` is its command."""
