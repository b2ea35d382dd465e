# what: nice, ionice, chrt and taskset: processes that rank themselves lower
# fails with strict: getpriority, ioprio_set and the policies of sched_setscheduler are left to the node
# shown with strict: cannot get niceness
# packages: util-linux coreutils
# set: some
nice -n 5 true
taskset -c 0 true
ionice -c 3 true
chrt --batch 0 true
