"""Simulate training runs: what would the losses have been under another curriculum?

task + recipe + curricula ──record──▶ runs ──fit──▶ simulator ──what_if──▶ forecast ──verify──▶ truth
"""

import lazy_loader

# Names come from __init__.pyi, and are imported when they are first used: torch alone takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
