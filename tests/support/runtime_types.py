"""The type checker that the tests switch on inside ``ivegan``; see pytest's options."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a fine float, as in PEP 484
