// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	if os.Getpid() == 1 {
		boot() // does not return
	}
	if len(os.Args) == 3 && os.Args[1] == guestVerb {
		os.Exit(runGuest(os.Args[2]))
	}
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: vm [flags] all | SUITE...")
		for _, s := range suites {
			fmt.Fprintf(os.Stderr, "  %-9s %s\n", s.name, s.about)
		}
		flag.PrintDefaults()
	}
	repo := flag.String("repo", ".", "root of the repository")
	memory := flag.Int("memory", 4096, "MiB of guest memory")
	accel := flag.String("accel", "", `"kvm" or "tcg"; empty: kvm if it really works`)
	flag.Parse()
	chosen, err := choose(flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err = run(ctx, *repo, *memory, *accel, chosen)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		os.Exit(1)
	}
}

func choose(names []string) ([]suite, error) {
	var chosen []suite
	if len(names) == 1 && names[0] == "all" {
		for _, s := range suites {
			if s.all {
				chosen = append(chosen, s)
			}
		}
		return chosen, nil
	}
	if len(names) == 0 {
		return nil, errors.New("which suite?")
	}
names:
	for _, name := range names {
		for _, s := range suites {
			if s.name == name {
				chosen = append(chosen, s)
				continue names
			}
		}
		return nil, fmt.Errorf("no suite %q", name)
	}
	return chosen, nil
}

// run boots one guest for each suite and goes on after one that failed.
func run(ctx context.Context, repo string, memoryMiB int, accel string, chosen []suite) error {
	repo, err := filepath.Abs(repo)
	if err != nil {
		return err
	}
	h := host{repo: repo, dir: filepath.Join(repo, "build", "vm"), memoryMiB: memoryMiB, accel: accel}
	lock, err := h.lock(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := h.prepare(ctx); err != nil {
		return err
	}
	var errs []error
	for _, s := range chosen {
		if err := h.runSuite(ctx, s); err != nil {
			errs = append(errs, fmt.Errorf("suite %s: FAIL: %w", s.name, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}
