"""The model zoo: tiny random models that keep the structure of each Hugging Face family, and what the rewrites make of them.

`families.py` is the registry, one entry a family; `runner.py` compiles one case of it and compares with eager;
`table.py` makes `golden.jsonl`, which `tests/test_zoo.py` holds the rewrites to, and the tables of `docs/zoo.md` from it.
"""
