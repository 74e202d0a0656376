"""Training, evaluation and answers from the command line: ``python main.py --help`` shows how."""

from generative_recommenders.commands.program import imported

if __name__ == "__main__":
    imported("commands.main").start()
