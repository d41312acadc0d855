"""What an implementation does not offer: its operations give None there, which is no answer."""


def not_stabilised(f):
    """Nothing where a rank-stabilised scale is asked for."""
    return lambda t, c: None if c["rslora"] else f(t, c)
