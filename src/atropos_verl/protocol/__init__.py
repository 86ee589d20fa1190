"""The trajectory API from outside: the bytes on the wire (``wire``) and the client that moves them."""
