c="1024 2000 100"
timeout 60 ncu --clock-control none -k regex:resident_kernel -c 1 --section SourceCounters --section WarpStateStats --section SpeedOfLight -f -o /tmp/a python3 scratch/tail.py $c > /dev/null 2>&1
ncu --import /tmp/a.ncu-rep --page details 2>/dev/null | grep -E "Duration|Elapsed Cycles|SM Frequency" 
ncu --import /tmp/a.ncu-rep --page source --csv > $OUT/a.csv
