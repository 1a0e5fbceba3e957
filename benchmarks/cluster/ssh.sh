#!/bin/sh
# Stands in for ssh: enters the namespace of the host that it is given, and runs the command there. Options are ignored;
# as with ssh, they may come before the host and after it.
host=
while :; do
    case $1 in
    -[opliFJLRDbcemwWSEQ]) shift 2 ;;
    -*) shift ;;
    *)
        [ -n "$host" ] && break
        host=${1##*@}
        shift
        ;;
    esac
done
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
