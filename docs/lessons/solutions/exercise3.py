"""A solution of exercise 3."""


def hidden(backward, buckets):
    """Of the time in which at least one bucket is under way, the share that lies within the backward."""
    joined = []
    for begin, end in sorted(buckets):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    whole = sum(end - begin for begin, end in joined)
    inside = sum(max(0, min(end, backward[1]) - max(begin, backward[0])) for begin, end in joined)
    return inside / whole if whole else 1
