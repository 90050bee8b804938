#!/bin/bash
# What sshd runs for a session: the command that was asked for, in the environment that the container was given.
# shellcheck disable=SC1091
. "$HOME/.node-environment"
exec bash -c "${SSH_ORIGINAL_COMMAND:-exec bash -i}"
