"""The benchmark suite: what the engine costs, how far that is from the limit, and what else there is.

One module measures one thing and adds rows to a file of results; `report` puts the files of all machines
side by side.
"""
