// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	periodUsec   = 100_000
	usecPerMilli = periodUsec / 1000

	minCPUMillis = 10      // a quota of 1 ms, the kernel's least
	maxCPUMillis = 1 << 30 // a million CPUs; keeps the quota within 64 bits
)

func (t *Tree) setCPU(dir string, millis int64) error {
	if t.onV2("cpu") {
		return writeFile(filepath.Join(t.v2, dir, "cpu.max"), cpuMax(millis))
	}
	root, ok := t.onV1("cpu")
	if !ok {
		return nil
	}
	return setQuotaV1(root, dir, millis*usecPerMilli)
}

// cpuMax is the text of cpu.max.
func cpuMax(millis int64) string {
	if millis == 0 {
		return fmt.Sprintf("max %d", periodUsec)
	}
	return fmt.Sprintf("%d %d", millis*usecPerMilli, periodUsec)
}

// setQuotaV1 writes the quota of a node, 0 for none. cgroup v1 refuses a
// quota above the parent's or below a child's. See the package doc.
func setQuotaV1(root, dir string, usec int64) error {
	if usec > 0 {
		node := root
		for s := range strings.SplitSeq(filepath.Dir(dir), "/") {
			node = filepath.Join(node, s)
			above, err := quotaV1(node)
			if err != nil {
				return err
			}
			if above > 0 {
				usec = min(usec, above)
			}
		}
	}
	node := filepath.Join(root, dir)
	if err := writeFile(filepath.Join(node, "cpu.cfs_period_us"), strconv.Itoa(periodUsec)); err != nil {
		return err
	}
	err := writeQuotaV1(node, usec)
	if usec > 0 && errors.Is(err, unix.EINVAL) {
		if err := capBelowV1(node, usec); err != nil {
			return err
		}
		return writeQuotaV1(node, usec)
	}
	return err
}

func writeQuotaV1(node string, usec int64) error {
	if usec == 0 {
		usec = -1
	}
	return writeFile(filepath.Join(node, "cpu.cfs_quota_us"), strconv.FormatInt(usec, 10))
}

// quotaV1 reads a node's quota per our period; 0 or less is none.
func quotaV1(node string) (int64, error) {
	quota, err := readInt(filepath.Join(node, "cpu.cfs_quota_us"))
	if err != nil || quota <= 0 {
		return 0, err
	}
	period, err := readInt(filepath.Join(node, "cpu.cfs_period_us"))
	if err != nil || period <= 0 {
		return 0, err
	}
	return max(1, quota*periodUsec/period), nil
}

// capBelowV1 lowers every quota below a node that is larger than usec.
func capBelowV1(node string, usec int64) error {
	children, err := childDirs(node)
	if err != nil {
		return err
	}
	for _, c := range children {
		child := filepath.Join(node, c)
		if err := capBelowV1(child, usec); err != nil {
			return err
		}
		have, err := quotaV1(child)
		if err == nil && have > usec {
			period, perr := readInt(filepath.Join(child, "cpu.cfs_period_us"))
			if err = perr; err == nil {
				err = writeQuotaV1(child, max(1000, usec*period/periodUsec))
			}
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a leaf may go meanwhile
			return err
		}
	}
	return nil
}

// cpuStat reads CPU time and throttling of a cgroup, in microseconds.
func (t *Tree) cpuStat(dir string) (usec uint64, throttled *uint64, err error) {
	if acct, ok := t.onV1("cpuacct"); ok {
		ns, err := readUint(filepath.Join(acct, dir, "cpuacct.usage"))
		if err != nil {
			return 0, nil, err
		}
		usec = ns / 1000
	} else {
		stat, err := readKeys(filepath.Join(t.v2, dir, "cpu.stat"))
		if err != nil {
			return 0, nil, err
		}
		var ok bool
		if usec, ok = stat["usage_usec"]; !ok {
			return 0, nil, fmt.Errorf("cpu.stat of %s has no usage_usec", dir)
		}
		if v, ok := stat["throttled_usec"]; ok {
			throttled = &v
		}
	}
	cpu, ok := t.onV1("cpu")
	if !ok {
		return usec, throttled, nil
	}
	stat, err := readKeys(filepath.Join(cpu, dir, "cpu.stat"))
	if err != nil {
		return 0, nil, err
	}
	if ns, ok := stat["throttled_time"]; ok {
		v := ns / 1000
		throttled = &v
	}
	return usec, throttled, nil
}

func cpuShortcoming(t *Tree) string {
	if t.onV2("cpu") {
		return ""
	}
	if _, ok := t.onV1("cpu"); !ok {
		return "cpu: no controller; no CPU limit holds"
	}
	return "cpu: on cgroup v1 a sandbox may not have more CPU than its tenant, and lowering a tenant's CPU lowers its sandboxes' for good"
}
