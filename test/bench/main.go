// SPDX-License-Identifier: Apache-2.0

// Command bench measures Bulkhead and what it is to be compared with, in turns
// within one run, and prints a table. It also writes build/bench.json.
//
//	BENCH=launch   only groups whose name matches (a regular expression)
//	CHECK=1        exit 1 if a limit is not met
//
// The groups:
//
//	launch   from the Create call to the first instruction of the command, with
//	         network and policy, against a bare containerd client without either
//	egress   the egress program by itself, and traffic through it
//	agent    what the agent costs while it has nothing to do
//	durable  what a record costs that survives a power failure
//
// Numbers of two runs are not comparable on a machine that does other work;
// ratios within a run are. Every row says the median; the table adds what lies
// between the 10th and the 90th percentile and how often it was measured.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/bulkheadhq/bulkhead/test/containerdtest"
)

var groups = []struct {
	name string
	run  func(*report) error
}{
	{"launch", launch},
	{"egress", egress},
	{"agent", agent},
	{"durable", durable},
}

func main() {
	ok, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	if err != nil || !ok && os.Getenv("CHECK") == "1" {
		os.Exit(1)
	}
}

func run() (ok bool, err error) {
	want, err := regexp.Compile(os.Getenv("BENCH"))
	if err != nil {
		return false, fmt.Errorf("BENCH: %w", err)
	}
	if os.Geteuid() != 0 {
		return false, errors.New("needs root: it runs a containerd, an agent and network namespaces of its own")
	}
	root, err := containerdtest.RepoRoot()
	if err != nil {
		return false, err
	}
	rep := &report{root: root, out: os.Stdout, file: filepath.Join(root, "build/bench.json"), ok: true}
	if err := rep.header(); err != nil {
		return false, err
	}
	done := make(chan error, 1)
	go func() { done <- rep.groups(want) }()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	select {
	case err = <-done:
	case s := <-stop:
		err = errors.Join(fmt.Errorf("ended by %s", s), rep.interrupt())
	}
	return rep.ok, err
}

func (rep *report) groups(want *regexp.Regexp) error {
	any := false
	for _, g := range groups {
		if !want.MatchString(g.name) {
			continue
		}
		any = true
		began := time.Now()
		rep.begin(g.name)
		if err := g.run(rep); err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		if err := rep.end(time.Since(began)); err != nil {
			return err
		}
	}
	if !any {
		return fmt.Errorf("BENCH=%s names no group", want)
	}
	return nil
}
