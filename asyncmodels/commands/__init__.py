"""The commands of the command line, one module each; ``asyncmodels.cli`` brings them together.

Each has an ``add_to`` that adds its parser, and imports nothing but the standard library until it runs.
"""

__all__: list[str] = []
