"""The runtime type checker of the tests: shapes and types of every annotated function of the library."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it
