#!/bin/sh
# Stands in for ssh: enters the namespace of the host that it is given, and runs the command there. Options are ignored.
while :; do
    case $1 in
    -[opliFJLRDbcemwWSEQ]) shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
host=${1##*@}
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
