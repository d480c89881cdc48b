"""The backend ``torch``: plain torch operators, on any device. Other backends borrow the blockwise algorithm."""
