import signal

# What a script starts in the background ignores these signals, and so do its children. Some tests stop processes with
# them, as a person at a terminal does.
for signum, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, default)
