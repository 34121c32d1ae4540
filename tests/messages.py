"""What a command prints for a user's mistake."""


def one_line_error(done):
    """Return the one line of a command that ended with a user's mistake."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]
