"""The command line: `commands` has the program; a module for each larger command, and for the options of several.

Nothing here imports torch or transformers before a command needs them.
"""

from .commands import app as app
from .commands import main as main
from .preparing import DEMO_MODEL as DEMO_MODEL
from .process import program as program
