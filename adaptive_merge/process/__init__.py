"""The process and the machine it runs on: locks that outlive no process, signals from start to exit. No torch here."""
