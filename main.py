"""Training, evaluation and answers from the command line: ``python main.py --help`` shows how."""

from generative_recommenders.commands.main import start

if __name__ == "__main__":
    start()
