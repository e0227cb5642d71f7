"""The applications that are compared with ``sql_app``: one file for each stack.

Each answers what ``sql_app`` answers to four requests. Their tables exist, and are filled, before
they start.
"""
