"""The model zoo: tiny random models that keep the structure of each Hugging Face family, and what the rewrites make of them.

`families.py` is the registry, one entry a family; `runner.py` compiles one case of it and compares with eager;
`table.py` makes `docs/zoo.md` and `golden.txt`, which `tests/test_zoo.py` holds the rewrites to.
"""
