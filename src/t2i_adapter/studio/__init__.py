"""The studio: runs, data and adapters in a browser. A window on run folders and on the command line.

The server holds no state that is not in a file, and imports no torch: every action is one verb in a process of its own.
"""
