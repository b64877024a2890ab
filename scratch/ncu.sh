set -u
for c in "1024 1 100" "1024 2000 100"; do
  t=$(echo $c | tr ' ' _)
  timeout 60 ncu --clock-control none -k regex:resident_kernel -c 1 --section SourceCounters --section WarpStateStats --section SpeedOfLight --section LaunchStats -f -o /tmp/$t python3 scratch/tail.py $c > /dev/null 2>&1
  ncu --import /tmp/$t.ncu-rep --page details 2>/dev/null | grep -E "Duration|Elapsed Cycles|SM Frequency|Warp Cycles|Registers|Block Size|Grid" 
  ncu --import /tmp/$t.ncu-rep --page source --csv > $OUT/$t.csv 2>$OUT/$t.err
  wc -l $OUT/$t.csv
done
