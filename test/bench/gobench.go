// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
)

// results of Go benchmarks: by name without "Benchmark" and the number of
// CPUs, then by unit.
type results map[string]map[string]series

var cpuSuffix = regexp.MustCompile(`-\d+$`)

// goBench runs the benchmarks of a package that match, count times each.
func goBench(root, pkg, match, benchtime string, count int) (results, error) {
	cmd := exec.Command("go", "test", "-run", "^$", "-bench", match, "-benchtime", benchtime, "-count", strconv.Itoa(count), pkg)
	cmd.Dir = root
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Env = append(os.Environ(), "CI=true") // what is missing is an error
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("benchmarks of %s: %w\n%s%s", pkg, err, out.String(), errs.String())
	}
	res := parseGoBench(out.String())
	if len(res) == 0 {
		return nil, fmt.Errorf("benchmarks of %s: none matches %s", pkg, match)
	}
	return res, nil
}

// parseGoBench reads lines of a name, the number of runs, and pairs of value
// and unit.
func parseGoBench(text string) results {
	res := results{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		name := cpuSuffix.ReplaceAllString(strings.TrimPrefix(f[0], "Benchmark"), "")
		if res[name] == nil {
			res[name] = map[string]series{}
		}
		for i := 2; i+1 < len(f); i += 2 {
			if v, err := strconv.ParseFloat(f[i], 64); err == nil {
				res[name][f[i+1]] = append(res[name][f[i+1]], v)
			}
		}
	}
	return res
}

// of answers what was measured, or an error that says what was not.
func (r results) of(name, unit string) (series, error) {
	if s := r[name][unit]; len(s) > 0 {
		return s, nil
	}
	return nil, fmt.Errorf("benchmark %s reports no %s", name, unit)
}
