"""The command line of the project, which is also `simplest-vit` and `python -m simplest_vit`.

python main.py --config configs/digits.py --workdir runs/digits
python main.py COMMAND --flags
"""

from simplest_vit.commands import main

if __name__ == "__main__":
    main()
