"""Numbers with a K or M behind them, as the benches take them."""


def count_by_1000(text):
    """1.5M is 1,500,000: positions in a stream."""
    return int(float(text[:-1]) * {"K": 10**3, "M": 10**6}[text[-1]]) if text[-1] in "KM" else int(text)


def count_by_1024(text):
    """4K is 4,096: lengths of rows."""
    return int(text[:-1]) * {"K": 1024, "M": 1024**2}[text[-1]] if text[-1] in "KM" else int(text)
