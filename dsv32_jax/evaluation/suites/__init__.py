"""Outside suites, run through the sandbox and the tools of agents."""
