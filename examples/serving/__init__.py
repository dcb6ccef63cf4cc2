"""A small serving engine over fi_ops: see `examples/serve.py`.

`model.py` is a Llama over a paged cache, `pages.py` who has which page, `step.py` the one compiled step, `engine.py` what runs
in it, `text.py` tokens to text, `server.py` HTTP, `status.py` the line on the screen.
"""
