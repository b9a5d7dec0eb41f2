"""NARVL: parallel vision-language models with Query-CTC, in plain torch and as a plugin for fairseq.

fairseq registers what it must know when it loads this folder as its user directory: it imports all modules of `tasks/`
and `models/`. Elsewhere `import narvl_plugin.registered` does so.
"""
